"""Experiments on GLUE (Wang et al., arXiv:1804.07461) and on your own sentences.

One run: `arguments` → `data` and `splits` (rows), `model`, `metrics` → `run`, which leaves a `record`. `submission`
writes the leaderboard's files, `tasks` has the table of GLUE's tasks, `configs` finds YAML files. Many runs: `sweep`,
then `report`. The quickstart runs `comparison`, on `sentences` from a package.
"""
