"""What is in Redis, and what may change it.

Keys, records, states, errors, settings, the codec, and one Lua script per transition behind
:class:`~perdure.protocol.store.Store`. Producer, workers and recovery import from here; this
package imports from none of them.
"""
