"""The control plane: it deploys placements as epochs, recovers from losses, and follows what operators want."""
