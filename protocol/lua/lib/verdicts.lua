-- The registry in which a verdict puts an id.
local ENDED = { finished = 'finished', failed = 'failed', canceled = 'canceled', stopped = 'canceled' }
