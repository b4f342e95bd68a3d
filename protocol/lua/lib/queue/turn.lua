-- Wake so many of the idle workers that serve the same queues, unless some are being woken.
local function wake(crowd, number)
  local name = KEY.turn .. crowd
  if redis.call('LLEN', name) > 0 then return end
  for _ = 1, number do redis.call('LPUSH', name, '1') end
  redis.call('EXPIRE', name, 60)
end

-- The worker that asks each second for its crowd is idle no more, or dead: another one is to.
local function pass_turn(crowd, incarnation)
  if redis.call('GET', KEY.looker .. crowd) ~= incarnation then return end
  redis.call('DEL', KEY.looker .. crowd)
  wake(crowd, 1)
end
