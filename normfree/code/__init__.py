"""Read: the functions of a model come in; out goes what a run does not tell: whose weights they use, what they go by.

``text`` has the text of a function, ``functions`` says which there are and which a forward comes to. ``weights`` finds
whose weight or bias somebody computes with besides its layer, ``held`` what a model holds besides its modules,
``settings`` by what values a forward goes. What is not understood counts as a use.
"""
