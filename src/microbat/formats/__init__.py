"""Number formats: what the bits mean. See ``microbat list formats``."""
