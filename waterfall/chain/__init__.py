"""The only room that speaks JSON-RPC: endpoints, fees, transactions, the typed vault."""
