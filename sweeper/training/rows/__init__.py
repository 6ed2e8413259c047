"""Models as rows of one matrix: the numbers of all weights next to each other, and their update.

``numbers`` says where in a row a parameter lies and converts to what torch keeps, ``leaves`` is
what a forward pass reads of it and is differentiated by, ``optimizer`` has the update rules, and
``fused`` all of them in one kernel for a GPU.
"""
