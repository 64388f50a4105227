"""The TensorFlow backend of mpsdk. Not there yet: this package holds its name and nothing else.

`framework="tensorflow"` is refused by `Estimator.plan` until the backend's entry point is installed.
"""
