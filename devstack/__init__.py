"""The embedded stack: real PostgreSQL, Redis (Valkey), Kafka, a mail sink and the services as child processes.

`python -m devstack` is `make dev`; tests, benchmarks and the chaos suite use `devstack.stack.Stack`:

    async with Stack(Topology.backing(replicas=1), root=tmp_path, durable=False) as stack:
        stack.urls.postgres_primary
        await stack.child("redis").pause()

Everything runs on free ports of 127.0.0.1, keeps its data and logs under one folder, and leaves no process behind, not
even when this one is killed.
"""
