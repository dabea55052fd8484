"""The GLUE tasks (Wang et al., arXiv:1804.07461): their table, data, metrics and one run."""
