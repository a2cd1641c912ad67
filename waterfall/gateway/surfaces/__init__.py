"""The ways in which a model may be called, each in the words of the provider that its clients were made for.

A surface knows how to read a request as far as its cost depends on it, what its upstream is sent, where in an answer or
a stream the usage stands, and how its clients read errors. What happens to the money is the same for all: `serving`.
"""

from waterfall.gateway.surfaces.api import Api
from waterfall.gateway.surfaces.chat import Chat
from waterfall.gateway.surfaces.embeddings import Embeddings
from waterfall.gateway.surfaces.messages import Messages
from waterfall.gateway.surfaces.responses import Responses

APIS: tuple[Api, ...] = (Chat(), Responses(), Messages(), Embeddings())
API_OF = {api.surface: api for api in APIS}
