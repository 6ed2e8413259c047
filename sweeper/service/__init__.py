"""What looks after all studies of a store: the long-running half of ``launch``, for a cluster.

``finish`` ends a study as `sweeper launch` does, ``watch`` finds those that are to be ended, and
everything lost on the way, ``board`` is what is known meanwhile, and ``endpoint`` shows it as
``/healthz``, ``/livez`` and ``/metrics``. ``agreement`` compares what store and MLflow say of a
study.
"""
