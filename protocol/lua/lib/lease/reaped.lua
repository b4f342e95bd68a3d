-- Whether an incarnation was declared dead. It then holds nothing and may claim nothing.
local function reaped(incarnation)
  return redis.call('HEXISTS', KEY.incarnation .. incarnation, 'reaped') == 1
end
