"""The QLM planner: place and order request groups by their estimated waiting times.

``problem`` is what the planner knows at an epoch as arrays, ``cost`` what a virtual queue costs, ``construct`` builds
plans, ``master`` combines their queues into the best plan on SCIP, and ``planner`` turns plans into LSOs.
"""
