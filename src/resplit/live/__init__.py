"""The live page of a cluster: what it shows, the stream of events that feeds it, and its files."""
