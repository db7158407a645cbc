"""Running rewritten decoders: compiled pieces, host decisions at exits, and a cache with per-layer lengths."""
