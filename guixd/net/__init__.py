"""The network side: what is fetched by a helper process without the daemon's privileges."""
