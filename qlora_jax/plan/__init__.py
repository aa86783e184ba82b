"""`qlora-jax plan`: what a training run takes of a device, found out without the device."""
