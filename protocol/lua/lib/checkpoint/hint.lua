-- Tell the producer that there is something to read. It may get lost: what counts is what stands in the keys. Returns
-- how many have heard it.
local function hint(client, id, what)
  if (client or '') == '' then return 0 end
  return redis.call('PUBLISH', KEY.replies .. client, id .. ' ' .. what)
end
