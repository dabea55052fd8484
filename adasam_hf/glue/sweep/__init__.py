"""A grid of fine-tuning runs from one YAML file.

`validation` and `specification` turn the file into runs (`run`), `records` says which of them are finished, `choice`
what their trials chose, `cost` how long the rest takes. `preparation` looks for what would make every run fail,
`execution` does one run in a process of its own, `engines` do many at once, `procedure` puts all of it in order, and
`command` is the command line.
"""
