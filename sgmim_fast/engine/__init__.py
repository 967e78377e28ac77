"""What pre-training and fine-tuning share: a training from its command to its last checkpoint."""
