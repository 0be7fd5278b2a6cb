"""`flora-receiver dev`: the service on a laptop, behind a tunnel.

Called by `cli.app`; imports `service` and `cli.doctor.probe`.
"""
