--- @include lib/basics/numbers
--- @include lib/basics/time

-- Checkpoints written before this moment (ms) are older than ttl_ms. Time without sweeps does not count, be it the last
-- gap or one that still goes on: in an outage no request could go on, and when the server's clock steps ahead no time
-- passes.
local function stale_before(ttl_ms)
  local row = redis.call('HMGET', KEY.pulse, 'at', 'away_from', 'away_to')
  local at, from, to = number_of(row[1]), number_of(row[2]), number_of(row[3])
  local swept = at > 0 and at < now_ms and at or now_ms
  local cut = swept - ttl_ms
  if from == 0 or to > swept or cut >= to then return cut end
  return cut - (to - from)
end
