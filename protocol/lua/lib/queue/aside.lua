--- @include lib/basics/numbers

-- Beside their lists queues have sets: retries, suspects, what workers of RQ's own have taken, leases, deadlines. The
-- index `aside` names the queues of which one holds something, with the time (ms) from which a claim has to look at
-- it; '+inf' for leases and deadlines alone, which only sweeps look at. Whoever writes into such a set says so here; a
-- sweep puts it right again. So what a sweep or a claim costs does not depend on how many names there are.
local function note_aside(queue, at)
  -- A user of an access list that does not know the key: the next sweep that comes by finds it.
  redis.pcall('ZADD', KEY.aside, 'LT', at, queue)
end

-- What the sets of a queue say now.
local function settle_aside(queue)
  local at
  for _, name in ipairs({ KEY.retries, KEY.suspects }) do
    local score = tonumber(redis.call('ZRANGE', name .. queue, 0, 0, 'WITHSCORES')[2])
    if score and score < (at or math.huge) then at = score end
  end
  if redis.call('EXISTS', KEY.bounced .. queue) == 1 then at = 0 end
  if at or redis.call('EXISTS', KEY.leases .. queue, KEY.deadlines .. queue) > 0 then
    redis.call('ZADD', KEY.aside, at and int(at) or '+inf', queue)
  else
    redis.call('ZREM', KEY.aside, queue)
  end
end
