"""A receiver of OTLP over HTTP on this machine, which keeps the spans it is sent."""

import contextlib

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """Keeps every span it is sent."""

    def __init__(self):
        self.spans = []
        self.service = {}

    async def take(self, request):
        assert request.path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(await request.read()).resource_spans:
            self.service = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return web.Response(content_type="application/x-protobuf")

    def by_name(self):
        return {span.name: span for span in self.spans}


@contextlib.asynccontextmanager
async def collector():
    kept = Collector()
    app = web.Application()
    app.router.add_post("/{any:.*}", kept.take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield kept, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
