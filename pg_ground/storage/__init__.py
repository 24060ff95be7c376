"""Files on this machine, in buckets, on the Hugging Face Hub and on Kaggle."""
