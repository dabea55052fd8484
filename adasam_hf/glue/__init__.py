"""Experiments on GLUE (Wang et al., arXiv:1804.07461) and on one's own sentences.

One run: `arguments` → `data` and `splits` (rows), `model`, `metrics` → `run`, which leaves a `record`; `submission` has
the leaderboard's files, `tasks` the table of GLUE's tasks, `configs` finds YAML files. Many runs: `sweep`, then
`report`. `comparison` is what the quickstart does, on `sentences` from a package.
"""
