"""What was counted: counters on the device, and figures made of them."""
