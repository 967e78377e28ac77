"""Fine-tuning on depth and segmentation, and its evaluation."""
