"""The loop: decide a step in integers, run it on the device, hand the new tokens back."""
