--- @include lib/numbers
--- @include lib/time

-- A page of a sorted set or list, another one in each period of so many ms: all members come once in size / n of them.
local function some_of(name, size, period_ms, command, count)
  local number = redis.call(count or 'ZCARD', name)
  if number == 0 then return {} end
  local place = math.floor(now_ms / period_ms) % math.ceil(number / size) * size
  return redis.call(command or 'ZRANGE', name, int(place), int(place + size - 1))
end
