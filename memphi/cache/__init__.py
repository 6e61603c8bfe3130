"""Where keys and values of running sequences are kept."""
