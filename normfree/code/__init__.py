"""Read: functions of a model come in; out goes which layers are always called together, which are used elsewhere.

A norm's gain and bias may move onto the layer in front only if no path of the model, seen in a run or not, uses one
without the other. What is not understood counts as a use.

The path of the reading, each step on those before it:

- *Text.* ``bytecode`` has every Python's instructions in one vocabulary; ``chains`` are the names in it, ``self.a.b``.
- *Which code.* ``functions``: what is wrapped, named, whose. ``failing``: what cannot run without norms. ``reach`` and
  ``holding``: methods, helpers, objects and classes that the model's code comes to; of large libraries not all.
- *The calls that were seen.* ``straight``, ``branching``, ``known``: in the code that made them, layer and norm follow
  each other whatever is decided. ``settings``: what a rewritten forward goes by.
- *What else is done with a module.* ``using``, ``words``, ``asking``: it is asked, handed out, or used. ``sequences``,
  ``stepping``: loops that call wholes. ``paths``: which modules a chain may end at. ``handing``: which a function is
  given. ``opening``: which layers are reached through what holds them. ``seen``: whether a call is one of the run.
- *The answer.* ``naming`` puts it together.
"""
