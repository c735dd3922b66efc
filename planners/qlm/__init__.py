"""The QLM planner: place and order request groups by their estimated waiting times.

``problem`` is what the planner knows at an epoch as arrays, ``cost`` what a virtual queue costs, ``plan`` the queues of
all instances. ``construct`` and ``heuristics`` build plans, ``sequencing`` searches for better ones, and ``master``
combines their queues on SCIP; ``layers`` runs these one after another, whatever fails, and ``report`` is what it tells.
``planner`` decides when to plan, and ``operations`` turns plans into LSOs.
"""
