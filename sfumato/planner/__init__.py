"""What a run takes, before a device is rented."""
