"""The demo: a small LLaVA answers questions about photographs, with and without letting its visual tokens leave.

``assets`` holds the model, its plans and held-out questions; ``data`` reads them, ``evaluate`` measures, ``plots``,
``report`` and ``tables`` show. ``run`` is what the command line calls.
"""
