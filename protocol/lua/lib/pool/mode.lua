--- @include lib/basics/numbers
--- @include lib/basics/time

-- Whether the pool was declared degraded: it has too few workers. A declaration ends by itself at `until`.
local function degraded()
  local mode = redis.call('HMGET', KEY.mode, 'mode', 'until')
  return mode[1] == 'degraded' and now_ms < number_of(mode[2])
end
