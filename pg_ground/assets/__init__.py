"""Files that travel with the package, the script that makes them."""
