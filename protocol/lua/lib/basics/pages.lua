--- @include lib/basics/numbers
--- @include lib/basics/time

-- A page of `size` members of a sorted set or list, the next one in each period of so many ms: in time, all of them.
local function some_of(name, size, period_ms, command, count)
  local number = redis.call(count or 'ZCARD', name)
  if number == 0 then return {} end
  local place = math.floor(now_ms / period_ms) % math.ceil(number / size) * size
  return redis.call(command or 'ZRANGE', name, int(place), int(place + size - 1))
end
