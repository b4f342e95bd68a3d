--- @include lib/basics/time
--- @include lib/queue/turn

-- Of the idle workers that serve the same queues (a crowd) one asks again each second: a stock producer rings no
-- bell. The others wait until they are rung. Whoever asks is named in a key of 3 s, and passes its turn on when it
-- takes work. Returns whether this is the one.
local function take_turn(crowd, incarnation, status)
  local name = KEY.looker .. crowd
  local who = redis.call('GET', name)
  if who and who ~= incarnation then return false end
  redis.call('SET', name, incarnation, 'PX', 3000)
  if not who then
    redis.call('HSET', KEY.incarnation .. incarnation, 'crowd', crowd) -- for whoever finds it dead: reap.lua
    redis.call('EXPIRE', KEY.incarnation .. incarnation, DAY)
  end
  -- What waits is left to others, of whom nobody asks.
  if status == 'blocked' then wake(crowd, 8) end
  return true
end
