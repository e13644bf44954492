"""The compiled engine: columns in, columns out. It knows no files, no model names and no screens.

`state.pack()` makes a `State` (a NamedTuple of columns), `loop.advance()` moves it through time and says why it
returned. `blocks.py` is the pool, `schedule.py` one `schedule()` call, `loop.py` the clock around it. The rules
are those of vLLM's V1 scheduler; the numbers in comments (3.6, ...) are those of the rule list that
`docs/scheduler.md` explains.
"""
