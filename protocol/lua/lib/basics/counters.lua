-- HINCRBY for a field that may hold something else: what is no number counts as 0. Returns the sum.
local function add(name, field, by)
  local sum = redis.pcall('HINCRBY', name, field, by)
  if type(sum) ~= 'table' then return sum end
  redis.call('HSET', name, field, by)
  return by
end

local function count(event, queue, by)
  add(KEY.counters, event .. ':' .. queue, by or 1)
end
