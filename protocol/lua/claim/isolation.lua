--- @include lib/basics/time

-- A worker isolates while it holds suspects, or drains for them: it takes nothing else. Whether this one may: it does
-- already, or fewer than half of the living do.
local function may_isolate(incarnation)
  for _, other in ipairs(redis.call('ZRANGE', KEY.isolating, 0, 127)) do
    if other == incarnation then return true end
    -- Whoever holds nothing has drained, ended or died.
    if redis.call('EXISTS', KEY.held .. other) == 0 then redis.call('ZREM', KEY.isolating, other) end
  end
  local living = redis.call('ZCOUNT', KEY.beats, '(' .. now_text, '+inf')
  return redis.call('ZCARD', KEY.isolating) < math.max(1, math.floor(living / 2))
end

local function isolate(incarnation)
  redis.call('ZADD', KEY.isolating, now_text, incarnation)
  redis.call('EXPIRE', KEY.isolating, DAY) -- a suspect may run for hours before it is cleared
end
