"""The network of builds: devices in their namespaces, and a filter for who moves the packets."""
