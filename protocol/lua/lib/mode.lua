--- @include lib/numbers
--- @include lib/time

-- Whether the pool has too few workers. Whoever says so says until when: nobody need take it back.
local function degraded()
  local mode = redis.call('HMGET', KEY.mode, 'mode', 'until')
  return mode[1] == 'degraded' and now_ms < number_of(mode[2])
end
