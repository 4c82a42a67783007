"""Solvers: families that turn a process and a list of times into the rows of a plan.

A family is one module. `_base` holds what a solver must say of itself; `_registry` holds the
names.
"""
