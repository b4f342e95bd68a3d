--- @include lib/basics/numbers

-- Whether no newer protocol than the caller's has written here. If the caller's is newer than all, Redis notes it: so
-- the first worker or producer of a newer protocol stops all older ones.
local function speaks(schema)
  local newest = number_of(redis.call('GET', KEY.schema), -1)
  if newest > tonumber(schema) then return false end
  if newest < tonumber(schema) then redis.call('SET', KEY.schema, schema) end
  return true
end
