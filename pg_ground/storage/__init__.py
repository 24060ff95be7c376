"""Files on this machine, in a bucket and on the Hugging Face Hub."""
