"""QLM's own programs, as the paper states them, on SCIP: references and planners for small clusters.

- :mod:`slot_problem`: the data of one problem, and what an assignment and order of groups costs.
- :mod:`slot_model`: assignment, order and accumulated time in SCIP, which both programs share.
- :mod:`slot_program`: the program of the paper's second version; :mod:`chance_program`: of its first.
- :mod:`exhaustive`: both by enumeration.
- :mod:`planner`: either one as a planner.

``docs/planner.md`` has the notation, and says what the paper leaves open and how it is read here.
"""
