"""From captured charges to the chain and back: lanes that send, an indexer that reads.

Ten rules, learned from what broke in other relayers, and where each is kept:

1. The vault is the idempotency layer: to send again is always safe for money, care for nonces only saves gas. `lane`
2. The journal's row is the nonce's allocation; there is no second counter. `ledger.slots.open_slot`
3. Signed bytes are durable before they are broadcast, the same bytes are sent again, an attempt is never signed again. `lane`
4. A broadcast was accepted, refused, or nobody knows; told apart by the node's message, in one table. `chain.refusals`
5. A slot has many attempts, whose receipts are all asked for before anything is concluded from its nonce. `lane`
6. One slot in flight on each lane; more comes from larger batches, then from more lanes. `lane`, `batches`
7. EIP-1559 fees; a replacement raises both by a tenth at least, and comes after a block that left the last one out;
   never above a cap, where the same is sent again.
   `chain.fees`, `chain.transactions.bump`, `gas`
8. Finality by the chain's tags or by depth; block hashes are kept, and what the chain takes back is taken back here;
   events that a node leaves out are missed. `finality`, `indexer`, `ledger.projection`
9. Gas limits by formula; what reverts is tried out and split; short of gas money nothing is sent, and calls are accepted
   until too many charges wait. `chain.vault.settle_gas`, `batches`, `gas`, `relayer`
10. Of two relayers on one database one leads each part; the chain's nonce is the fence; a foreign nonce halts its lane.
   `ledger.store.Ledger.leads`, `ledger.shared.hold_view`, `lane`
"""
