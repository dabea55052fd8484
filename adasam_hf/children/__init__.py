"""A folder for PYTHONPATH, by which the Python processes that a launched program starts are patched as it is."""
