"""Model families: where the decoder is, which tokens are visual, and how inputs become decoder inputs."""
