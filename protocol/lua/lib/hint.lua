-- Tell the producer that something is to be read. Only a hint: the truth stands in the keys.
local function hint(client, id, what)
  if client and client ~= '' then redis.call('PUBLISH', KEY.replies .. client, id .. ' ' .. what) end
end
