"""Files that travel with the package, and the script that makes them."""
